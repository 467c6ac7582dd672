"""Token ids that every vocabulary has."""

PAD_ID = 0
"""Token id of padding, and of the decoder's first input (T5's and Marian's convention)."""
EOS_ID = 1
"""Token id that ends every source and every target."""
UNK_ID = 2
"""Token id of what the tokenizer cannot represent."""
