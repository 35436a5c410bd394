"""vLLM: an attention backend whose blocks hold kvcomp's pages. `plugin.register` is the entry point."""
