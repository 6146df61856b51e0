"""Services' loggers are tested by a command of their own, as they need packages of the extra ``loggers``."""


def pytest_ignore_collect(collection_path, config):
    return True if "loggers" not in config.getoption("markexpr") else None
