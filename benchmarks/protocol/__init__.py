"""The parts of ``benchmarks.methods``: one protocol that compares all methods of learning from demonstrations."""
