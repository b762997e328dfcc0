"""See the package."""


class MlflowException(Exception):
    def __init__(self, message, status):
        super().__init__(message)
        self.status = status

    def get_http_status_code(self):
        return self.status
