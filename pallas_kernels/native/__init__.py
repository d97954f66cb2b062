"""Kernels for CPUs that numba compiles and XLA calls by its typed FFI: what all of them stand on.

`pointers` has what numba's language lacks, `xla_ffi` XLA's structures, `tasks` shares work among XLA's
threads, `tiles` multiplies in registers, `columns` walks down the columns of a panel, `loading` compiles a
handler and makes it known to XLA.
"""
