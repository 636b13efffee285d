# Fails where an object of a path defines a function that the linker shares with other objects (csrc/cpu/kernels/path.h):
# cmake -DNM=nm -DSPACE=hici::cpu::<path> -DOBJECTS="a.o;b.o" -P weak_symbols.cmake
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} -C --defined-only ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REPLACE ";" "," symbols "${symbols}")
  string(REGEX MATCHALL "[^\n]+" symbols "${symbols}")
  if(NOT symbols)
    message(FATAL_ERROR "${object} defines nothing")
  endif()
  foreach(symbol IN LISTS symbols)
    # weak functions (W), weak objects (V), unique objects (u); those of the path's own namespace have no other copy
    if(symbol MATCHES "^[0-9a-f]+ [WVu] " AND NOT symbol MATCHES "${SPACE}::")
      message(FATAL_ERROR "${object} defines `${symbol}`: code for this path could end up in the others")
    endif()
  endforeach()
endforeach()
