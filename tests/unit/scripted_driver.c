// libcuda.so.1 as far as the CUDA runtime asks before it touches a device; what it answers is in the environment.
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

static int number(const char* name, int otherwise) {
  const char* text = getenv(name);
  return text == NULL ? otherwise : atoi(text);
}

int cuDriverGetVersion(int* version) {
  *version = number("DRIVER_VERSION", 13000);
  return 0;
}

int cuInit(unsigned flags) {
  (void)flags;
  return number("DRIVER_INIT", 0);
}

static int not_supported(void) { return 801; }

int cuGetExportTable(const void** table, const void* id) {
  (void)id;
  *table = NULL;
  return 500;
}

int cuGetProcAddress_v2(const char* symbol, void** function, int version, unsigned long flags, int* status) {
  (void)version;
  (void)flags;
  if (status != NULL) *status = 0;
  if (strcmp(symbol, "") == 0 || strcmp(symbol, "cuGetProcAddress") == 0) {
    *function = (void*)cuGetProcAddress_v2;
  } else if (strcmp(symbol, "cuDriverGetVersion") == 0) {
    *function = (void*)cuDriverGetVersion;
  } else if (strcmp(symbol, "cuInit") == 0) {
    *function = (void*)cuInit;
  } else if (strcmp(symbol, "cuGetExportTable") == 0) {
    *function = (void*)cuGetExportTable;
  } else {
    *function = (void*)not_supported;
  }
  return 0;
}
