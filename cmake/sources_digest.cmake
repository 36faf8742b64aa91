# A digest of the C++ and CUDA sources under csrc/ that a core is made of, for those who must know whether it is theirs:
# SHA-256 over a line "PATH SHA-256-OF-FILE" for each, sorted by path.
function(tgt_sources_digest root digest files)
  file(GLOB_RECURSE found LIST_DIRECTORIES false RELATIVE "${root}" "${root}/csrc/*.h" "${root}/csrc/*.cpp"
       "${root}/csrc/*.cu")
  list(FILTER found EXCLUDE REGEX "^csrc/emulator/")
  list(SORT found COMPARE STRING CASE SENSITIVE)
  set(lines "")
  foreach(path IN LISTS found)
    file(SHA256 "${root}/${path}" hash)
    string(APPEND lines "${path} ${hash}\n")
  endforeach()
  string(SHA256 whole "${lines}")
  set(${digest} "${whole}" PARENT_SCOPE)
  set(${files} "${found}" PARENT_SCOPE)
endfunction()
