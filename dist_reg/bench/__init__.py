"""How long the kernels take, each held against its formula first: a table of operations, and what times them."""
