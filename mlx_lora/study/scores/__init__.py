"""How well an answer is the wanted one: a file a family of scores; `choose` finds the one that suits the answers."""
