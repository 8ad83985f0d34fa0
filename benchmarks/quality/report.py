def table(*a):
    return ""


def plot(*a):
    pass


def write(*a):
    pass
