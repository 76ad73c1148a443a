"""Recall: a network reads pairs of keys and values among many other tokens, and is asked for the values of some keys.

The task is that of "multi-query associative recall" (Arora et al. 2023, arXiv 2312.04927), with a pair in one token and
without an order: the networks are trunks for diffusion, where every token reads all others.
"""
