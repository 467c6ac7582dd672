"""How ranks share a model: the mesh of ranks, collectives, vocabulary-chunked loss, recomputation."""
