"""W4A16 in Triton: kernels (`kernels`, `unpack`, `reduce`) and their launches (`launch`, `experts`).

The only folder beside `*_impl.py` whose modules import triton; nothing imports them before a call needs them.
"""
