"""Listeners for tests: what the code under test emits."""


class Heard(list):
    "Keeps the text of each note, in order; other events pass by"
    def __call__(self, event) -> None:
        if event.kind == "note": self.append(event.message)
