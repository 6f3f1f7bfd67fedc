import sys; sys.path.insert(0,"/tmp/wt/user/tests")
from chromium import Browser; from pathlib import Path
src=Path(sys.argv[1]); tag=sys.argv[2]
with Browser() as b:
    for name,w,dark in (("wide",1100,False),("narrow",390,False),("dark",1100,True)):
        b.open(src,width=w,dark=dark)
        h=b.evaluate("document.documentElement.scrollHeight"); sw=b.evaluate("document.documentElement.scrollWidth")
        print(name,h,sw,b.console)
        b.picture(Path(f"/tmp/user/{tag}-{name}-0.png"),top=0,height=1400)
        if name=="narrow": b.picture(Path(f"/tmp/user/{tag}-{name}-1.png"),top=1400,height=1600)
        if name=="wide": b.picture(Path(f"/tmp/user/{tag}-{name}-1.png"),top=1400,height=1800)
