class NativeKernels:
    @staticmethod
    def serve(form, dtype, device):
        return False


def native_library():
    return None
