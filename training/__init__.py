"""Training: a stand-in for CLIP's pre-training, then the paper's two stages on Ray Train with DeepSpeed ZeRO-2."""
