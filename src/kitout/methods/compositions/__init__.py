"""Compositions of adapters, registered as the methods are: an adapter that is made of other adapters of its kit."""
