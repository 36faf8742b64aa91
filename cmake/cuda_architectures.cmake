# CMAKE_CUDA_ARCHITECTURES, unless the user or the environment has set it: the GPU found, else sm_90, so that an ordinary
# install stays quick. Releases pass the full list.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND "$ENV{CUDAARCHS}" STREQUAL "")
  set(CMAKE_CUDA_ARCHITECTURES 90)
  find_program(TGT_NVIDIA_SMI nvidia-smi)
  if(TGT_NVIDIA_SMI)
    execute_process(
      COMMAND ${TGT_NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE TGT_CAPABILITIES ERROR_QUIET RESULT_VARIABLE TGT_SMI_STATUS TIMEOUT 20)
    if(TGT_SMI_STATUS EQUAL 0)
      string(REGEX MATCHALL "[0-9]+\\.[0-9]+" TGT_CAPABILITIES "${TGT_CAPABILITIES}")
      string(REPLACE "." "" TGT_CAPABILITIES "${TGT_CAPABILITIES}")
      list(REMOVE_DUPLICATES TGT_CAPABILITIES)
      if(TGT_CAPABILITIES)
        set(CMAKE_CUDA_ARCHITECTURES ${TGT_CAPABILITIES})
      endif()
    endif()
  endif()
endif()
