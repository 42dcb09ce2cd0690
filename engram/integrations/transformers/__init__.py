"""A memory in the models of transformers: attach, offload, folders of save_pretrained, checkpoints of its Trainer."""
