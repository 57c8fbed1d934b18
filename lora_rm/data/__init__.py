"""Preference files on one side, packed rows of token ids on the other."""
