//! System calls for which no library offers a safe wrapper, each made safe here. It knows nothing of
//! machines or servers. Every room but `model` and `http` uses it, most for descriptors.

pub mod beneath;
pub mod holes;
pub mod inherited;
pub mod jail;
pub mod lease;
pub mod memfd;
pub mod pidfd;
pub mod random;
pub mod resident;
pub mod seqpacket;
pub mod spawn;
pub mod tap;
pub mod thread;
pub mod title;
pub mod userfaultfd;
pub mod writeback;
