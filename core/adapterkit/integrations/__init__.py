"""The tools people train with, one file for each. Import the file of the tool that you use.

In: an adapted model and a tool. Out: what the tool needs to train, save and resume the adapters.
Uses: errors, results, tensors, contract, forward, model, formats, files, combining, checkpoints, adapters.
"""
