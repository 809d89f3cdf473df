"""The compiled CPU operators that both stages share."""
