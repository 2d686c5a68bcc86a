"""pytest-benchmark over the references and the packing, on a CPU: `make bench`. Not part of the tests."""
