"""Published models are tested by a command of their own, as they need packages of the extra ``projects``."""


def pytest_ignore_collect(collection_path, config):
    return True if "projects" not in config.getoption("markexpr") else None
