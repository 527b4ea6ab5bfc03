"""Verification: does the file that ships behave like the model it was made from?"""
