"""FocusLLaVA's server side: one package a stage."""
