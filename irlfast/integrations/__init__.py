"""The fused losses as drop-in replacements in other trainers."""
