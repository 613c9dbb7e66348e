"""Types and checks that all operations share."""
