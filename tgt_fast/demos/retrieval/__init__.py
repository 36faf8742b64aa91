"""``tgt-fast demo retrieval``: teacher-guided training of a retriever, with a pretrained sentence encoder as teacher."""
