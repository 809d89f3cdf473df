"""Storms: what the service does under more load, stranger input and more losses than anybody wishes for."""
