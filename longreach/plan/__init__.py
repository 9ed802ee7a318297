"""Arithmetic about models: operations, and (with later commands) memory, prices and claims."""
