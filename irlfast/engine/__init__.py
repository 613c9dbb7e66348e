"""Training: ``fit`` takes the optimiser steps of a phase, checkpoints them, and keeps them within a GPU's memory."""
