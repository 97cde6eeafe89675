"""Asynchronous methods over a parameter server: AsyLPG, Sparse-AsyLPG, Acc-AsyLPG and their baselines."""

from __future__ import annotations
