"""The kernels themselves, put together from `device` and `stages`; what launches them lies one folder up."""
