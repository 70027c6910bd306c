def blocks_for(direction, geometry):
    return 3


def workspace(direction, geometry):
    return (0, 0)
