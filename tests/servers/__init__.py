"""Servers that system tests talk to, each on loopback and in one folder."""
