# The CUDA backend of _C: real code for sm_80 and sm_90, PTX for what comes after. The runtime is
# linked statically, so the module imports with or without a driver.

if(NCSN_FAST_CUDA STREQUAL "OFF")
  message(STATUS "CUDA backend: OFF (NCSN_FAST_CUDA=0)")
  return()
endif()

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES "80-real;90-real;90-virtual")
endif()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(NCSN_FAST_CUDA STREQUAL "ON")
    message(FATAL_ERROR "NCSN_FAST_CUDA=1, but nvcc was not found. Put the CUDA toolkit's bin folder "
      "on PATH or set CUDACXX; NCSN_FAST_CUDA=0 builds without CUDA.")
  endif()
  message(STATUS "CUDA backend: OFF (nvcc not found on PATH)")
  return()
endif()

string(REGEX REPLACE "([0-9]+a?)-real" "sm_\\1" readable "${CMAKE_CUDA_ARCHITECTURES}")
string(REGEX REPLACE "[0-9]+a?-virtual" "+ PTX" readable "${readable}")
string(REPLACE ";" " " readable "${readable}")

set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

add_library(level_cuda OBJECT
  csrc/cuda/device.cu csrc/cuda/group_norm.cu csrc/cuda/instance_norm_plus.cu csrc/cuda/sampler_update.cu)
target_include_directories(level_cuda PRIVATE csrc/include)
target_compile_options(level_cuda PRIVATE --fmad=false)
target_sources(_C PRIVATE $<TARGET_OBJECTS:level_cuda>)
target_link_libraries(_C PRIVATE CUDA::cudart_static)
target_compile_definitions(_C PRIVATE
  NCSN_FAST_CUDA
  NCSN_FAST_CUDA_VERSION="${CMAKE_CUDA_COMPILER_VERSION}"
  NCSN_FAST_CUDA_ARCHITECTURES="${readable}")

string(REGEX MATCH "^[0-9]+\\.[0-9]+" nvcc_version "${CMAKE_CUDA_COMPILER_VERSION}")
message(STATUS "CUDA backend: ON (nvcc ${nvcc_version}, ${readable})")
