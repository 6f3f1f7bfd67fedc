"""Models: where their parts are (`arch`), how they load (`load`), and one set of weights in two views (`twin`)."""
