class LoRARequest:
    def __init__(self, *given):
        self.given = given
