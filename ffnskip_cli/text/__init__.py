"""Where text comes from: sources, corpora, mixtures."""
