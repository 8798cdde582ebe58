//! Memory that a process holds for what it has behind it: free parts of its heap, and pages of its program that only a
//! beginning needed. It says nothing about memory that is in use.

/// Gives both back to the kernel. Pages of the program that are needed again come from the page cache, some
/// microseconds for each 64 KiB. Makes brk, madvise and munmap calls, and no others.
pub fn give_back() {
    // SAFETY: glibc takes its own locks and gives back only what is free (malloc_trim(3)).
    unsafe { libc::malloc_trim(0) };
    // SAFETY: the callback has the type that is asked for, and takes no data.
    unsafe { libc::dl_iterate_phdr(Some(let_go), std::ptr::null_mut()) };
}

/// Lets go of the read-only segments of one object. What is written is no file's any more and stays.
unsafe extern "C" fn let_go(
    object: *mut libc::dl_phdr_info,
    _size: libc::size_t,
    _data: *mut libc::c_void,
) -> libc::c_int {
    // SAFETY: dl_iterate_phdr(3) passes a valid object, which nobody changes meanwhile.
    let object = unsafe { &*object };
    if object.dlpi_phdr.is_null() {
        return 0;
    }
    // SAFETY: so many headers lie there, for as long as the object is loaded.
    let headers = unsafe { std::slice::from_raw_parts(object.dlpi_phdr, usize::from(object.dlpi_phnum)) };
    for header in headers {
        if header.p_type != libc::PT_LOAD || header.p_flags & libc::PF_W != 0 {
            continue;
        }
        let start = object.dlpi_addr.wrapping_add(header.p_vaddr);
        let (Some(end), first) = (start.checked_add(header.p_memsz), start & !(PAGE_BYTES - 1)) else {
            continue;
        };
        let (Ok(length), Ok(first)) = (usize::try_from(end - first), usize::try_from(first)) else {
            continue;
        };
        // SAFETY: the pages are a private mapping of the program's file that was never writable, so the file still has
        // what they hold; whoever needs one gets it again (madvise(2), MADV_DONTNEED). Segments share no page.
        unsafe { libc::madvise(std::ptr::without_provenance_mut(first), length, libc::MADV_DONTNEED) };
    }
    0
}

/// Smallest page of x86-64; segments begin and end on these.
const PAGE_BYTES: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    /// KiB of the program's code that are resident.
    fn code_kb() -> u64 {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let (mut kb, mut is_code) = (0, false);
        for line in smaps.lines() {
            if let Some((_, rest)) = line.split_once(" r-xp ") {
                is_code = rest.contains('/');
            } else if let (true, Some(rest)) = (is_code, line.strip_prefix("Rss:")) {
                kb += rest.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
            }
        }
        kb
    }

    #[test]
    fn what_is_given_back_is_gone_and_the_program_goes_on() {
        let (before, words) = (code_kb(), vec!["kept".to_owned(); 1000]);
        drop(vec![1u8; 8 << 20]);
        give_back();
        let after = code_kb();
        assert!(after < before, "{after} kB of code, {before} before");
        assert!(words.iter().all(|word| word == "kept"));
    }
}
