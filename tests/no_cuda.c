/* A driver's library where there is no device. SGLang's kernels want these names when they are loaded; on a CPU nothing
   calls them, and who does is told CUDA_ERROR_NO_DEVICE. */
int cuCtxFromGreenCtx(void) { return 100; }
int cuCtxPopCurrent_v2(void) { return 100; }
int cuCtxPushCurrent_v2(void) { return 100; }
int cuDevResourceGenerateDesc(void) { return 100; }
int cuDevSmResourceSplitByCount(void) { return 100; }
int cuDeviceGetDevResource(void) { return 100; }
int cuDriverGetVersion(void) { return 100; }
int cuGetErrorString(void) { return 100; }
int cuGetProcAddress_v2(void) { return 100; }
int cuGreenCtxCreate(void) { return 100; }
int cuGreenCtxDestroy(void) { return 100; }
int cuGreenCtxGetDevResource(void) { return 100; }
int cuPointerGetAttribute(void) { return 100; }
int cuStreamCreate(void) { return 100; }
