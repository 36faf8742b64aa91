"""``tgt-fast demo retrieval``: teacher-guided training of a retriever; the teacher is a pretrained sentence encoder."""
