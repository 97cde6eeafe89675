"""Double quantization by a parameter server: AsyLPG and its relatives."""
