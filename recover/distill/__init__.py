"""Distillation: the loss (`loss`), and both passes of a twin with it in one forward (`distiller`)."""
