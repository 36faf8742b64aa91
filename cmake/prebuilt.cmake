# The objects that know nothing of Python, shared by the wheels of several Pythons (tools/build_wheels.sh):
#
#   cmake -S . -B DIR -DTGT_PREBUILD=ON [-DTGT_CUDA=...]; cmake --build DIR    makes libtgt_objects.a and tgt_objects.cmake
#   pip wheel . -C cmake.define.TGT_PREBUILT=DIR                               links them, and compiles the binding alone
#
# What DIR says of itself (compilers, architectures, sources) is what such a core says; of other sources it is refused.
option(TGT_PREBUILD "Build the objects that know nothing of Python, and no core" OFF)
set(TGT_PREBUILT "" CACHE PATH "A folder that TGT_PREBUILD=ON has built: its objects are linked instead of compiled")
if(TGT_PREBUILD AND TGT_PREBUILT)
  message(FATAL_ERROR "TGT_PREBUILD makes what TGT_PREBUILT takes: give one of them")
endif()

function(tgt_prebuild)  # of these targets
  set(objects "")
  foreach(target IN LISTS ARGN)
    list(APPEND objects "$<TARGET_OBJECTS:${target}>")
  endforeach()
  add_library(tgt_objects STATIC ${objects})
  set_target_properties(tgt_objects PROPERTIES LINKER_LANGUAGE CXX ARCHIVE_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}")
  set(runtime "")
  if(TGT_HAVE_CUDA)
    find_library(TGT_CUDART cudart_static PATHS ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES} REQUIRED)
    set(runtime "${TGT_CUDART};rt")
  endif()
  set(lines "")
  foreach(name IN ITEMS TGT_HAVE_CUDA TGT_SOURCES TGT_COMPILER TGT_CUDA_VERSION TGT_CUDA_INCLUDES TGT_ARCHITECTURES)
    string(APPEND lines "set(${name} [==[${${name}}]==])\n")
  endforeach()
  string(APPEND lines "set(TGT_CUDA_RUNTIME [==[${runtime}]==])\n")
  file(WRITE "${CMAKE_BINARY_DIR}/tgt_objects.cmake" "${lines}")
endfunction()

function(tgt_read_prebuilt)  # sets what TGT_PREBUILT says, and makes the target tgt_objects
  foreach(name IN ITEMS tgt_objects.cmake libtgt_objects.a)
    if(NOT EXISTS "${TGT_PREBUILT}/${name}")
      message(FATAL_ERROR "TGT_PREBUILT=${TGT_PREBUILT} holds no ${name}; build it there with TGT_PREBUILD=ON")
    endif()
  endforeach()
  set(here "${TGT_SOURCES}")
  include("${TGT_PREBUILT}/tgt_objects.cmake")
  if(NOT TGT_SOURCES STREQUAL here)
    message(FATAL_ERROR "TGT_PREBUILT=${TGT_PREBUILT} was built of other sources; build it again")
  endif()
  if((TGT_CUDA STREQUAL "ON" AND NOT TGT_HAVE_CUDA) OR (TGT_CUDA STREQUAL "OFF" AND TGT_HAVE_CUDA))
    message(FATAL_ERROR "TGT_CUDA=${TGT_CUDA}, but TGT_PREBUILT=${TGT_PREBUILT} was built otherwise")
  endif()
  add_library(tgt_objects STATIC IMPORTED)
  set_target_properties(tgt_objects PROPERTIES IMPORTED_LOCATION "${TGT_PREBUILT}/libtgt_objects.a"
                        INTERFACE_LINK_LIBRARIES "${TGT_CUDA_RUNTIME}")
  foreach(name IN ITEMS TGT_HAVE_CUDA TGT_COMPILER TGT_CUDA_VERSION TGT_CUDA_INCLUDES TGT_ARCHITECTURES)
    set(${name} "${${name}}" PARENT_SCOPE)
  endforeach()
endfunction()
