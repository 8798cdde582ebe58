//! The kernel's random numbers (getrandom(2)). Never a file: a jailed process has none to open, and a static program
//! that looks for the call by its name, as libraries do, does not find it.
use std::io;

/// Fills `data` from the kernel's generator, which is seeded long before any machine runs.
pub fn fill(mut data: &mut [u8]) -> io::Result<()> {
    while !data.is_empty() {
        // SAFETY: the kernel writes at most as many bytes as `data` has.
        let count = unsafe { libc::getrandom(data.as_mut_ptr().cast(), data.len(), 0) };
        match usize::try_from(count) {
            Ok(count) => data = data.split_at_mut(count.min(data.len())).1,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => (),
                error => return Err(error),
            },
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_filled() {
        let mut data = vec![0_u8; 1 << 16];
        fill(&mut data).unwrap();
        // Each of the 64 pieces of 1 KiB is all zeros with probability 2^-8192.
        assert!(data.chunks(1024).all(|piece| piece.iter().any(|byte| *byte != 0)));
        fill(&mut []).unwrap();
    }
}
