"""How the page looks: light or dark as the reader's system is, and narrow enough for a phone."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --panel: #f4f6f8; --line: #d8dde3; --text: #1c2024; --muted: #59616b; --shade: #08306b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15181c; --panel: #1f242a; --line: #3b424b; --text: #e6e9ec; --muted: #a5adb7; --shade: #8ec5ff;
  }
}
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page) }
main { max-width: 60rem; margin: 0 auto; padding: 2rem clamp(1rem, 4vw, 2rem) }
h1, h2, h3, p, figcaption { overflow-wrap: anywhere }
h1 { font-size: clamp(1.4rem, 5vw, 2rem); line-height: 1.2; margin: 0 0 .5rem }
h2 { font-size: 1.25rem; margin: 2.5rem 0 1rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 2rem 0 1rem }
p { max-width: 46rem; text-wrap: pretty }
.note, .legend, footer { color: var(--muted); font-size: .875rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9375rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .75rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { padding-left: 0 }
thead th { color: var(--muted); font-size: .8125rem; font-weight: 600; vertical-align: bottom }
tbody th { font-weight: 500 }
th:first-child, .words { text-align: left }
td.words { white-space: normal }
td.words:last-child { min-width: 12rem }
figure { margin: 0 0 1.75rem; max-width: 100% }
.wide + figure { margin-top: 2rem }
figcaption { font-weight: 600; margin-bottom: .5rem }
.maps { display: flex; flex-wrap: wrap; gap: 0 3rem }
.maps figure { min-width: 13rem }
.legend { display: flex; flex-wrap: wrap; align-items: center; gap: .1rem 1rem; margin: .5rem 0 0 }
.scale { width: 6rem; height: .75rem; border: 1px solid var(--line) }
.scale { background: linear-gradient(to right, transparent, var(--shade)) }
.line, .ring, .disc { display: inline-block; vertical-align: middle; margin-right: .4rem }
.line { width: 1.25rem; border-top: 3px solid }
.ring, .disc { width: .5rem; height: .5rem; border: 2px solid var(--muted); border-radius: 50% }
.disc { background: var(--muted) }
svg { display: block }
.curves svg { max-width: 100%; height: auto }
svg text { font: 12px system-ui, sans-serif; fill: var(--muted) }
svg .grid { stroke: var(--line) }
svg .cell { fill: var(--shade); stroke: var(--line) }
svg .target { fill: var(--page) }
summary { cursor: pointer }
pre { overflow: auto; max-height: 32rem; padding: 1rem; background: var(--panel); border-radius: .375rem }
pre { font-size: .8125rem }
@media (max-width: 30rem) {
  table { font-size: .8125rem }
  th, td { padding: .3rem .25rem }
  thead th { font-size: .75rem }
  thead th, tbody th { white-space: normal }
  .curves text { font-size: 18px }
}
"""
