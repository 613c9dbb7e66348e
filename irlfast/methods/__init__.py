"""Methods: each a short function in its own file that strings the steps of DESIGN §1 together."""
