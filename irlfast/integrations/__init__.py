"""The fused losses as drop-ins for other trainers."""
