# Compilers run through ccache where there is one, unless something else was asked for: CMAKE_CXX_COMPILER_LAUNCHER and
# CMAKE_CUDA_COMPILER_LAUNCHER stay as they are given. TGT_CCACHE=OFF compiles without.
#
# A fresh clone is another folder: paths under the sources are hashed relative to the build, which lies at the same place
# in each. And pip puts what a build needs into a folder that is never the same: tgt_keep_headers() copies a package's
# headers into the build, where they are found again, by ccache and by a build in the same folder.
option(TGT_CCACHE "Compile through ccache where it is installed" ON)

function(tgt_use_ccache)  # before the targets
  if(NOT TGT_CCACHE)
    return()
  endif()
  find_program(TGT_CCACHE_PROGRAM ccache)
  if(NOT TGT_CCACHE_PROGRAM)
    return()
  endif()
  set(settings "CCACHE_NOHASHDIR=1")
  if(NOT DEFINED ENV{CCACHE_BASEDIR})
    list(APPEND settings "CCACHE_BASEDIR=${CMAKE_SOURCE_DIR}")
  endif()
  foreach(language IN ITEMS CXX CUDA)
    if(NOT DEFINED CMAKE_${language}_COMPILER_LAUNCHER)
      set(CMAKE_${language}_COMPILER_LAUNCHER "${CMAKE_COMMAND}" -E env ${settings} "${TGT_CCACHE_PROGRAM}" PARENT_SCOPE)
    endif()
  endforeach()
  message(STATUS "compiling through ${TGT_CCACHE_PROGRAM}; TGT_CCACHE=OFF compiles without")
endfunction()

function(tgt_keep_headers target folder)  # of a target that has an include folder with `folder` in it
  if(NOT TARGET ${target})
    return()
  endif()
  get_target_property(includes ${target} INTERFACE_INCLUDE_DIRECTORIES)
  set(kept "")
  foreach(include IN LISTS includes)
    if(IS_DIRECTORY "${include}/${folder}")
      file(COPY "${include}/${folder}" DESTINATION "${CMAKE_BINARY_DIR}/headers")
      set(include "${CMAKE_BINARY_DIR}/headers")
    endif()
    list(APPEND kept "${include}")
  endforeach()
  if(kept)
    set_target_properties(${target} PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${kept}"
                          INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "${kept}")
  endif()
endfunction()
